"""The order in which training reads its sequences: the n-th sample of a run is a function of n and the run's settings.

sampler.py         passes over the sequences, which resume at any sample; phases with shorter sequences
mixed_sampler.py   sources by weight
permutation.py     permutations of any size; the elements of large ones are computed when they are read
sample_order.py    the settings that determine the order, with which alone a checkpoint can resume
"""
