"""What can only be seen on a GPU: its results beside the CPU's, bfloat16, torch.compile, NCCL.

All of it is skipped without CUDA. GPU_TEST_DEVICE=cpu tries the tests themselves on a CPU.
"""

import os
import shutil
import signal
from contextlib import nullcontext

import pytest
import test_geometry
import torch
from common import (
    CONES, ROOT, SHORT, in_process, losses_of, saved, signal_at, small, small_batch, some_shards,
    torchrun,
)

import evaluate
import train
from geometry import GEOMETRIES

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA"),
    pytest.mark.usefixtures("few_held_out"),
]
FLAGS = [*SHORT, "--device", DEVICE, "--lr", "1e-4"]
FLOAT32 = [*FLAGS, "--dtype", "float32", "--no-compile"]


@pytest.mark.parametrize("case", test_geometry.CASES)
def test_golden_values_of_all_logits_and_cones(case):
    evaluate.pick_device(DEVICE)  # switches TF32 off
    with torch.device(DEVICE):
        close = (torch.float32, 1e-4)
        test_geometry.test_the_authors_code_and_eighty_digits_agree(case, "truth", close)


def test_no_matrix_product_uses_tf32():
    """With TF32, whose mantissa has 10 bits, the error is about 1e-3."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    device = evaluate.pick_device(DEVICE)
    torch.manual_seed(0)
    x, y = torch.randn(2, 512, 512)
    errors = [(x.to(device) @ y.to(device)).cpu() - x @ y]
    images, patches = torch.randn(8, 3, 64, 64), torch.randn(64, 3, 8, 8)
    found = torch.conv2d(images.to(device), patches.to(device), stride=8).cpu()
    errors.append(found - torch.conv2d(images, patches, stride=8))
    assert max(error.abs().max() for error in errors) < 3e-4  # of terms of size 23 and 14


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_embeddings_equal_those_of_the_cpu(geometry):
    model, (images, tokens) = small(geometry), small_batch()
    with torch.no_grad():
        expected = model(images, tokens)
        found = model.to(evaluate.pick_device(DEVICE))(images.to(DEVICE), tokens.to(DEVICE))
    for a, b in zip(found, expected):
        assert (a.cpu() - b).abs().max() < 1e-5 * b.abs().max()


def gradient(model, loss, autocast, weight):
    """-> loss, gradient of all parameters as one vector, in float64."""
    images, tokens = small_batch(16)
    part = train.split_batch(images, tokens, 0, 258, torch.device(DEVICE))[0]
    model.zero_grad()
    with autocast:
        outputs = model(*part)
    value = loss(*outputs, weight, torch.full((), 0.1, device=DEVICE))["loss"]
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).double()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_compiled_step_in_bfloat16_follows_the_eager_one_in_float32(geometry):
    torch._dynamo.reset()
    model = small(geometry).to(evaluate.pick_device(DEVICE))
    weight = 0.2 if model.geometry.cones else 0.0
    exact_loss, exact = gradient(model, model.loss, nullcontext(), weight)
    model.compile()
    half = torch.autocast(DEVICE, torch.bfloat16)
    loss, found = gradient(model, torch.compile(model.loss), half, weight)
    assert loss == pytest.approx(exact_loss, rel=0.02)
    assert found @ exact / (found.norm() * exact.norm()) > 0.98


def test_micro_batches_do_not_change_the_run(tmp_path):
    for size in (0, 4):
        in_process(*FLOAT32, *CONES, "--micro_batch", size, "--out_dir", tmp_path / str(size))
    assert losses_of(tmp_path / "4") == pytest.approx(losses_of(tmp_path / "0"), rel=1e-4)


def test_a_stopped_and_resumed_run_has_the_same_losses(tmp_path, monkeypatch):
    in_process(*FLOAT32, *CONES, "--out_dir", tmp_path / "whole")
    signal_at(monkeypatch, 4, signal.SIGTERM)
    in_process(*FLOAT32, *CONES, "--out_dir", tmp_path / "parts")
    assert saved(tmp_path / "parts")["step"] == 4
    in_process("--resume", "--device", DEVICE, "--out_dir", tmp_path / "parts")
    expected = losses_of(tmp_path / "whole")
    assert len(expected) == 8 and losses_of(tmp_path / "parts") == pytest.approx(expected, rel=1e-4)


def test_two_epochs_of_shards_by_two_workers_equal_those_of_the_cpu(tmp_path):
    """On a GPU, the loader pins the memory of batches."""
    source = some_shards(tmp_path)  # about 48 readable samples
    flags = [*FLOAT32, "--data", source, "--samples", 96]
    in_process(*flags, "--workers", 2, "--out_dir", tmp_path / "device")
    in_process(*flags, "--device", "cpu", "--out_dir", tmp_path / "cpu")
    device, cpu = saved(tmp_path / "device"), saved(tmp_path / "cpu")
    assert device["skipped"] == cpu["skipped"] and device["skipped"]
    expected = losses_of(tmp_path / "cpu")
    assert len(expected) == 12
    assert losses_of(tmp_path / "device") == pytest.approx(expected, rel=1e-3)


def count_as_several(folder):
    """-> a copy of train.py for which one process is a group of several: it joins its embeddings by
    the gather, wraps the model in DistributedDataParallel, and sums over the group."""
    folder.mkdir()
    shutil.copytree(ROOT / "lab", folder / "lab")
    places = 0
    for name in ("geometry.py", "model.py", "data.py", "evaluate.py", "train.py"):
        text = (ROOT / name).read_text()
        places += text.count("world_size() > 1")
        (folder / name).write_text(text.replace("world_size() > 1", "dist.is_initialized()"))
    assert places >= 4
    return folder / "train.py"


@pytest.mark.seconds(900)
def test_one_process_by_nccl_in_compiled_bfloat16_follows_one_without_a_group(tmp_path):
    script = count_as_several(tmp_path / "several")
    flags = [*FLAGS, *CONES, "--dtype", "bfloat16", "--compile"]
    env = {"PYTHONPATH": str(tmp_path / "several")}  # not this project's modules
    done = torchrun(1, script, *flags, "--out_dir", tmp_path / "group", timeout=850, **env)
    assert done.returncode == 0, done.stderr
    in_process(*FLOAT32, *CONES, "--out_dir", tmp_path / "alone")
    expected = losses_of(tmp_path / "alone")
    assert len(expected) == 8 and losses_of(tmp_path / "group") == pytest.approx(expected, rel=0.02)
