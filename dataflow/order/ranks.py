"""Which of how many processes this one is, from what its launcher put into the environment."""

from __future__ import annotations

from collections.abc import Mapping

from connectors.errors import BadInputError

__all__ = ["rank_from_environment"]

# Most specific first: torchrun inside a SLURM step sets both, and its ranks are the ones that train. SLURM counts only
# inside a step (srun): in a batch script without srun there is one process, whatever SLURM_NTASKS says.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def rank_from_environment(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Return (rank, world size) as set by torchrun, Open MPI, MPICH or Intel MPI, or srun, in this order.

    >>> rank_from_environment({"RANK": "2", "WORLD_SIZE": "4"})
    (2, 4)

    Returns:
        None where no launcher set anything.

    Raises:
        BadInputError: A launcher's variables are not two integers with `0 <= rank < world size`.
    """
    for rank_name, size_name in _LAUNCHERS:
        rank, size = environ.get(rank_name), environ.get(size_name)
        if rank is None and size is None:
            continue
        if size is None and rank_name == "SLURM_PROCID":
            continue
        try:
            found = int(rank or ""), int(size or "")
        except ValueError:
            found = (0, 0)
        if not 0 <= found[0] < found[1]:
            raise BadInputError(
                f"the environment has {rank_name}={rank} and {size_name}={size}; set both, with "
                "0 <= rank < world size, or neither, or pass rank= and world_size=, or wait with this "
                "until torch.distributed is initialised"
            )
        return found
    return None
