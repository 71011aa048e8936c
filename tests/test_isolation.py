"""Calls in new processes: results, memory layout, failures."""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from latency_pkl.isolation import FreshProcess, in_fresh_process

HUGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def test_a_result_comes_back_from_another_process_each_time():
    pids = {in_fresh_process(os.getpid) for _ in range(3)}
    assert len(pids) == 3 and os.getpid() not in pids


@pytest.mark.parametrize('threads', [1, 2])
def test_the_number_of_threads_is_handed_on(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert in_fresh_process(torch.get_num_threads) == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(('call', 'word'), [(int, 'x'), (os._exit, 3), (sys.exit, 0)])
def test_a_call_without_a_result_is_an_error_and_the_next_one_works(call, word):
    with pytest.raises(RuntimeError, match='ended without a result'):
        in_fresh_process(call, word)
    assert in_fresh_process(max, 3, 4) == 4


def test_a_new_start_after_the_process_that_forks_was_killed():
    forker = in_fresh_process(os.getppid)
    os.kill(forker, signal.SIGKILL)
    os.waitid(os.P_PID, forker, os.WEXITED | os.WNOWAIT)
    assert in_fresh_process(max, 3, 4) == 4


def test_an_interrupted_call_leaves_no_answer_for_the_next():
    in_fresh_process(max, 1, 2)  # the process that forks is there
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_fresh_process(time.sleep, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert in_fresh_process(max, 3, 4) == 4


def test_what_is_called_keeps_what_it_has_until_the_end():
    with FreshProcess(itertools.count(5).__next__) as one, FreshProcess(itertools.count(5).__next__) as other:
        assert [one(), one(), other(), one()] == [5, 6, 5, 7]
    pid = in_fresh_process(os.getpid)
    deadline = time.monotonic() + 10
    while Path(f'/proc/{pid}').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f'/proc/{pid}').exists()  # ended, and not left as a zombie


def test_each_process_has_another_memory_layout():
    """Forked processes would all have the same layout, and repetition would not average out its cache collisions."""
    made = "[t.data_ptr() for t in [__import__('torch').empty(3**i) for i in range(4, 15)]]"
    layouts = [in_fresh_process(eval, made) for _ in range(4)]
    distances = {tuple(a - b for a, b in itertools.pairwise(places)) for places in layouts}
    assert len(distances) == 4


def test_large_tensors_are_in_huge_pages():
    if not HUGE.exists() or '[never]' in HUGE.read_text():
        pytest.skip('the system gives no huge pages')
    made = "[__import__('torch').ones(2**23), open('/proc/self/smaps_rollup').read()][1]"
    found = next(line for line in in_fresh_process(eval, made).splitlines() if line.startswith('AnonHugePages'))
    assert int(found.split()[1]) >= 30 * 1024  # kB, of 32 MB
