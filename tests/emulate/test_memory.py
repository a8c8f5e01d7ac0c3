"""The memory of an emulated card: a limit, per card, shared by processes, with nothing behind it."""

from __future__ import annotations

from pathlib import Path

from emulated_driver import Call

GIB = 1 << 30


def test_what_does_not_fit_is_refused_and_what_is_freed_can_be_had_again(call: Call) -> None:
    code = """
first = alloc(3 << 30)
print(alloc(2 << 30) is None)
free(first)
print(alloc(3 << 30) is not None)
"""
    assert call(code, memory_bytes=4 * GIB, context_bytes=0).split() == ["True", "True"]


def test_the_context_is_taken_before_the_first_allocation(call: Call) -> None:
    told = call("print(unused())", memory_bytes=4 * GIB, context_bytes=GIB)
    assert int(told) == 3 * GIB


def test_small_allocations_share_pages_and_large_ones_take_whole_ones(call: Call) -> None:
    code = """
before = unused()
small = [alloc(512) for _ in range(4096)]
print((before - unused()) // MIB)
alloc(3 * MIB)
print((before - unused()) // MIB)
"""
    assert call(code).split() == ["2", "6"]


def test_every_card_has_its_own_memory(call: Call) -> None:
    code = """
use(1)
alloc(1 << 30)
one = unused()
use(0)
print(unused() - one)
"""
    assert int(call(code)) == GIB


def test_processes_with_one_ledger_count_against_one_memory(call: Call, tmp_path: Path) -> None:
    """Two processes of 3 GiB do not fit on a card of 5 GiB; once the first has ended, the second does."""
    code = """
read, write = os.pipe()
ready, told = os.pipe()
if os.fork() == 0:
    os.write(told, b"y" if alloc(3 << 30) else b"n")
    os.read(read, 1)
    os._exit(0)
print(os.read(ready, 1).decode())
print(alloc(3 << 30) is None)
os.write(write, b"x")
os.wait()
print(alloc(3 << 30) is not None)
"""
    told = call(code, ledger=tmp_path / "ledger", memory_bytes=5 * GIB, context_bytes=0)
    assert told.split() == ["y", "True", "True"]


def test_addresses_grow_and_are_never_handed_out_twice(call: Call) -> None:
    code = """
taken = [alloc(MIB << (i % 5)) for i in range(200)]
print(taken == sorted(taken), len(set(taken)) == len(taken))
free(taken[7])
print(alloc(MIB) > taken[-1])
print(free(12345) != 0)
"""
    assert call(code).split() == ["True", "True", "True", "True"]


def test_what_the_host_reads_is_zero_and_no_page_is_touched_for_it(call: Call) -> None:
    code = """
import mmap, resource
source = alloc(256 * MIB)
place = mmap.mmap(-1, 256 * MIB)
address = c.addressof(c.c_char.from_buffer(place))
place[5 * MIB] = 7
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cuda.cuMemcpyDtoH_v2(c.c_void_p(address), c.c_uint64(source), c.c_size_t(256 * MIB))
print(place[5 * MIB], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 64 * 1024)
print(cuda.emu_num_reads())
"""
    assert call(code).split() == ["0", "True", "1"]


def test_physical_memory_of_expandable_segments_is_limited_too(call: Call) -> None:
    code = """
location = (c.c_int * 8)(1, 1, 1, 0)
def create(size):
    handle = c.c_void_p()
    status = cuda.cuMemCreate(c.byref(handle), c.c_size_t(size), location, c.c_uint64(0))
    return handle if status == 0 else None
first = create(3 << 30)
print(create(3 << 30) is None)
cuda.cuMemRelease(first)
print(create(3 << 30) is not None)
"""
    assert call(code, memory_bytes=5 * GIB, context_bytes=0).split() == ["True", "True"]
