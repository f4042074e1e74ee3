"""Jobs of a thread: in their order, within their memory, and no error is lost."""

import time
from threading import Event, Thread

import pytest

from glq.background import Background


def test_jobs_are_done_in_their_order():
    background, done = Background(100), []
    for i in range(20):
        background.give(lambda i=i: (time.sleep(0.001 * (i % 3)), done.append(i)))
    background.wait()
    assert done == list(range(20))
    background.close(drop=False)


@pytest.mark.parametrize("ask", ["give", "check", "wait"])
def test_an_error_is_raised_by_what_is_called_next_and_no_job_begins_after_it(ask):
    background, done, go = Background(100), [], Event()

    def fail():
        go.wait()
        raise OSError(28, "No space left on device")

    background.give(fail)
    background.give(lambda: done.append("behind it"))
    go.set()
    background._jobs[-1][0].result()
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            {"give": lambda: background.give(done.clear), "check": background.check, "wait": background.wait}[ask]()
    background.close(drop=False)
    assert not done


def test_bytes_that_wait_are_bounded():
    background, go = Background(10), Event()
    background.give(go.wait, 6)
    background.give(lambda: None, 4)
    more = Thread(target=background.give, args=(lambda: None, 1))
    more.start()
    more.join(0.2)
    assert more.is_alive()
    go.set()
    more.join()
    done = []
    background.give(lambda: (time.sleep(0.05), done.append(1)), 11)
    assert done  # what is larger than all that may wait is not waited for by anything else
    background.close(drop=False)


@pytest.mark.parametrize("drop", [False, True])
def test_what_was_given_is_done_at_the_end_or_dropped(drop):
    background, begun, go, done = Background(10), Event(), Event(), []
    background.give(lambda: (begun.set(), go.wait(), done.append(1)))
    background.give(lambda: done.append(2))
    begun.wait()
    Thread(target=lambda: (time.sleep(0.1), go.set())).start()
    background.close(drop)
    assert done == ([1] if drop else [1, 2])
