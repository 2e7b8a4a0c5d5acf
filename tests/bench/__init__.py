"""The budgets of the design, measured: `python -m tests.bench` (it needs Linux, for /proc).

The yardstick is a bare handler that accepts, signs and forwards but stores nothing. It is measured in the
same run, on the same loop, against the same receiver, so that most figures are ratios that survive a change
of machine.

    load ──http──> relay, or the bare handler ──https──> receiver

    __main__.py   options; what was measured, printed
    figures.py burdens.py   what is measured: one function a round, and the budget of each figure
    curves.py     what is measured at several places: endpoints, bodies, backlogs, connections
    comparison.py compared/   the relay beside what teams use today
    rounds.py     all rounds, one after another, and how busy the machine was
    budget.py tally.py   a measurement and its figures; what turns add up to
    stage.py      receiver, load and the measured system, brought together in one folder
    processes.py  a process and its children from outside: lines, CPU time, memory, end
    machine.py disk.py   what it was measured on
    report.py markdown.py plot.py   samples in; a table, the README's tables, a picture of the curves out
    profile.py    where the relay's time goes, by py-spy
    receiver.py bare.py load.py   the processes themselves
"""
