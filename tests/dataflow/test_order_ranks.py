import pytest

from connectors.errors import BadInputError
from dataflow.order.ranks import rank_from_environment

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, (0, 3)),
        (SLURM, (5, 8)),
        ({**SLURM, "RANK": "11", "WORLD_SIZE": "16"}, (11, 16)),
    ],
)
def test_launchers_are_known(environ: dict[str, str], expected: tuple[int, int] | None) -> None:
    assert rank_from_environment(environ) == expected


def test_a_batch_script_outside_a_slurm_step_is_one_process() -> None:
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "one", "WORLD_SIZE": "4"},
        {"PMI_RANK": "0", "PMI_SIZE": ""},
    ],
)
def test_half_set_or_senseless_variables_are_refused_by_name_with_what_to_do(environ: dict[str, str]) -> None:
    with pytest.raises(BadInputError, match=rf"{next(iter(environ))}.* until torch\.distributed is initialised"):
        rank_from_environment(environ)
