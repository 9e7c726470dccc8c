"""Probes of a backbone's activations, and of what SAEs make of them, fitted on train images.

features   what of an image a probe reads, on train and test images alike
sample     which train images, and which of them the penalty is chosen by
collect    one pass over them, for all SAEs of a wave; tables in the store
fits       each probe an artifact of the store
prober     what a run asks: the probes of its units
"""
