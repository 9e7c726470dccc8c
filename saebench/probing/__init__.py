"""Probes of a backbone's activations, and of what SAEs make of them, fitted on train images.

features   what of an image a probe reads, on train and test images alike
sample     which train images, and which of them the penalty is chosen by
collect    one pass over them, for all SAEs of a wave; what there is to be made and read:
           jobs        a table, and everything that can change it
           chunks      the pass, chunk by chunk, and what is done where something goes wrong
           tables      the files of a chunk
           collected   what there is of a sample then
size       what those take on the disk, before a run
fits       each probe an artifact of the store
           train_codes codes as fits read them, in memory or in files
           stored      a fit as arrays
taxonomy   the levels above the classes
prober     what a run asks: the probes of its units
probes     the probes of a unit, as its task finds them
predicting them applied to a batch of test images
measures   the rows that come of it

The solvers are in `saebench.probe`, which knows numbers alone; what a run has to know of probes
before it loads torch, in `saebench.probe_options` and `saebench.probe_features`.
"""
