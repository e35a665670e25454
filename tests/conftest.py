"""Settings of every test."""

import signal

from nextvec.process import yield_waiting_threads

yield_waiting_threads()  # before torch is imported: tests share their machine
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background ignores Ctrl-C, and so would all it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
