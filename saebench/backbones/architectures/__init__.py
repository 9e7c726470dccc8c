"""The forward passes that saebench knows, one family a file, each as steps (`backbones.steps`).

`timm_models` and `open_clip_models` say which file knows which class.
"""
