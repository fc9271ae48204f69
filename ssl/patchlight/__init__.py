"""Patch-level self-supervised pretraining of vision models."""


def __getattr__(name: str) -> str:
    """The version, read when it is needed: patchlight_kernels imports torch, which parts of patchlight do without."""
    if name != "__version__":
        raise AttributeError(f"module 'patchlight' has no attribute {name!r}")
    from patchlight_kernels import __version__

    return __version__
