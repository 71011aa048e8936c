"""Calls in new processes: results, memory layout, failures."""

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latency_pkl import isolation
from latency_pkl.isolation import FreshProcess, bound_to, fastest_core, in_fresh_process
from models.config import load_config
from tools.errors import BadInput

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


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='processes are not bound to cores here')
def test_one_thread_has_one_core_and_its_caller_waits_there():
    """More threads, and what comes after a call, have all cores."""
    allowed, before = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cores = [in_fresh_process(os.sched_getaffinity, 0) for _ in range(2)]
        assert in_fresh_process(os.sched_getaffinity, os.getpid()) == {fastest_core()}
        assert cores == [{fastest_core()}] * 2 and fastest_core() in allowed and os.sched_getaffinity(0) == allowed
        with pytest.raises(RuntimeError):
            in_fresh_process(int, 'x')
        assert os.sched_getaffinity(0) == allowed
        seen = []
        with bound_to(fastest_core()):
            seen.append(os.sched_getaffinity(0))
        assert seen == [{fastest_core()}]
        torch.set_num_threads(2)
        assert in_fresh_process(os.sched_getaffinity, 0) == allowed
    finally:
        torch.set_num_threads(before)


def test_the_fastest_core_is_the_one_whose_sums_take_least(monkeypatch):
    now, core = [0.0], [None]
    seconds = {4: 3.0, 6: 1.0, 7: 2.0}

    def count():
        now[0] += seconds[core[0]]
        return now[0]

    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(seconds), raising=False)
    monkeypatch.setattr(os, 'sched_setaffinity', lambda _, cores: core.__setitem__(0, min(cores)), raising=False)
    monkeypatch.setattr(isolation, 'time', SimpleNamespace(perf_counter=count))
    assert fastest_core.__wrapped__() == 6


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


def test_bad_input_is_raised_by_the_caller_and_the_process_goes_on(capfd):
    with FreshProcess(load_config) as there:
        for name in ('one.config', 'other.config'):
            with pytest.raises(BadInput, match=name):
                there(name)
    assert not capfd.readouterr().err
