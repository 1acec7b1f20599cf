"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

SubjectArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN|MODEL",
        help="Run folder, model folder or hub id. Default: the embedded model.",
    ),
]
BaseModel = Annotated[
    str | None, typer.Option(help="Where the base model of RUN lies now, if it has moved.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Over several GPUs, not with --device: auto, balanced, ... Default: as in RUN."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Backend = Annotated[
    str | None,
    typer.Option(help="Of latent attention: triton or reference. Default: triton on a GPU."),
]
