"""From the documents of a split to sequences of one length.

    packing.py           documents to sequences, contiguous, whole or best_fit
    best_fit.py          best-fit decreasing: which documents share a sequence
    generated.py         the endless sequences of a source that generates them
    mixed_sequences.py   those of several sources
    packed_splits.py     all of these: the sequences of each split of a corpus

../collation.py lists the tensors of a sequence.
"""
