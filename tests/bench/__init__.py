"""The budgets of the design, measured: `python -m tests.bench` (it needs Linux, for /proc).

The yardstick is a bare handler that accepts, signs and forwards but stores nothing. It is measured in the
same run, on the same loop, against the same receiver, so that most figures are ratios that survive a change
of machine.

    load ──http──> relay, or the bare handler ──https──> receiver

    __main__.py   options, rounds, progress
    figures.py    what is measured: one function a round, and the budget of each figure
    stage.py      receiver, load and the measured system, brought together in one folder
    processes.py  a process from outside: its lines, its CPU time, its memory, its end
    report.py     samples in, table or JSON out
    profile.py    where the relay's time goes, by py-spy
    receiver.py bare.py load.py   the processes themselves
"""
