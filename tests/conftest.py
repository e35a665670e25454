"""Settings of every test."""

import signal

from nextvec.process import yield_waiting_threads

yield_waiting_threads()  # before torch is imported: tests share their machine
# a job in the background ignores Ctrl-C, and so would all that it starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
