import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from stand_ins import train

from model.training.memory_use import bytes_of_others, give_back_free_memory, peak_memory_bytes, resident_bytes
from scripts.reporting.sharing import OF_LIBRARIES


def test_peak_memory_of_a_process():
    assert peak_memory_bytes(torch.device("cpu")) > 50e6


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone starts VmHWM anew")
def test_the_peak_of_a_run_is_that_of_its_training(tmp_path):
    before = peak_memory_bytes(torch.device("cpu"))
    earlier = torch.ones(100_000_000 + before // 4)  # larger than all that this process ever held, and a mapping
    peak = peak_memory_bytes(torch.device("cpu"))
    assert peak > before + 400e6
    del earlier
    assert peak_memory_bytes(torch.device("cpu")) > peak - 10e6  # the system counts pages in batches
    assert train(tmp_path, max_steps=2).summary["peak_memory_bytes"] < peak - 300e6


def test_what_was_freed_goes_back():
    blocks = [torch.ones(25_000) for _ in range(3000)]  # 100 kB each: glibc's heap
    held = resident_bytes()
    del blocks[:-1]  # one lives on, at the heap's end
    if give_back_free_memory():
        assert resident_bytes() < held - 250e6


def test_the_memory_of_other_processes_is_what_the_allocator_does_not_hold(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 250)
    for integrated, expected in ((0, 650), (1, None)):  # such a GPU shares the memory of the whole system
        properties = SimpleNamespace(is_integrated=integrated)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, found=properties: found)
        assert bytes_of_others(torch.device("cuda", 0)) == expected
    assert bytes_of_others(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_another_process_on_a_gpu_is_told_from_the_libraries_of_this_one():
    device = torch.device("cuda", 0)
    matrix = torch.ones(512, 512, device=device)
    (matrix @ matrix).sum().item()  # loads cuBLAS
    alone = bytes_of_others(device)
    assert alone < OF_LIBRARIES
    program = "import torch; held = torch.empty(1 << 30, device='cuda:0'); print(flush=True); input()"  # 4 GiB
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert bytes_of_others(device) >= alone + (4 << 30)
    finally:
        other.communicate(b"\n")
