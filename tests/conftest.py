"""Settings of every test."""

from nextvec.process import yield_waiting_threads

yield_waiting_threads()  # before torch is imported: tests share their machine
