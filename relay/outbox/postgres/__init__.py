"""The outbox in PostgreSQL, which many relays may share.

    opening      the address in, the verbs out
    links        connections, and what an error of the database means
    schema       what the database looks like, version by version
    statements   the SQL of the hot path
    writing      one transaction: all that waits to be written goes in
    committer    gathers what waits, one transaction after the other
    store        what every verb means
    changes      what rearranges many deliveries, step by step
    listing      looking at what is kept
    move, arrival     an SQLite outbox comes in: which step comes when; each step

The truth is in the database alone: what is claimed stands in a table there, because no relay knows what the
others do. Kept to SQL that other engines which speak its protocol have as well, but for what is said where
it stands; run on PostgreSQL only, so the others are untested.
"""
