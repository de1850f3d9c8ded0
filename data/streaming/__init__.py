"""Training on documents that are read in their files, for datasets that do not fit on the disk.

streamed.py          sequences of documents, from any position in the files on
streamed_loader.py   batches of them, and the positions up to which a run has trained
"""
