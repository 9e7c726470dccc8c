"""saebench: how good is this sparse autoencoder, and how does it compare, on which backbone?"""

__version__ = "0.1.0"
