__version__ = "0.1.0"


def __getattr__(name: str):
    "The four functions of `wlsft.study.api`, imported when they are used."
    if name in ("finetune", "sweep", "evaluate", "export"):
        from .study import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
