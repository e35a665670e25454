"""Settings of every test."""

from nextvec.cli import yield_waiting_threads

yield_waiting_threads()  # before torch is imported: tests share their machine
