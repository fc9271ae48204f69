"""Patch-level self-supervised pretraining of vision models."""


def __getattr__(name: str) -> str:
    if (
        name == "__version__"
    ):  # read when needed: patchlight_kernels imports torch, which parts of patchlight do without
        from patchlight_kernels import __version__

        return __version__
    raise AttributeError(f"module 'patchlight' has no attribute {name!r}")
