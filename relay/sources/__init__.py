"""Sources: what applications submitted by `relay_submit`, inside transactions of their own, becomes events.

An application's call of the SQL function leaves a row in its own database, which is there when its
transaction commits and never was when that rolls back. Here rows are taken, kept in the outbox, and deleted.

    submit.sql    the function and its table, for the application's migrations
    script        the same, made to fit a schema
    rows          pure: a row -> a draft, which rows may go now, why one cannot
    database      the statements; no other file knows the driver
    reader        one source: take, keep, delete, wait; it comes back by itself
    readers       all sources, which come and go while the others run

What is promised:

- A committed row becomes an event exactly once in one outbox. The rows are locked while they are kept, and
  deleted in the transaction that locked them; a crash in between leads to a repeat, which the outbox
  recognises by the row's id. So that it can, nothing is forgotten that was accepted since the last moment at
  which everything taken was known to be deleted (`Readers.settled_ms`).
- Several relays share the rows of a source. Those of one key go in the order of `seq`: a row waits while an
  older one of its key is in another relay's hands.
- What cannot be accepted stays with its reason and holds up nothing else.
- A source that is away, or an outbox that is full, changes nothing but that its rows wait.
"""
