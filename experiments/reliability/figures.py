# SPDX-License-Identifier: Apache-2.0
"""The page of the kill test."""

from collections.abc import Mapping

from experiments.shared.page import Content, head, table

COLUMNS = {
    "trial": "trial",
    "signal": "signal",
    "moment": "moment",
    "status": "exit status",
    "logged_steps": "steps logged",
    "checkpoints": "complete checkpoints",
    "save_cut_off": "during a save",
    "starts": "starts",
    "each_step_logged_once": "each step logged once",
    "identical": "identical",
}


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md, of {"kills"}."""
    content = results["kills"]
    kills, terms = content["sigkill"], content["sigterm"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in content["mesh"].items())
    good = kills["identical"] == kills["runs"] and terms["identical"] == terms["runs"]
    lines = head(
        "Killed and started again",
        claim="A run that is killed at any moment and started again with the same "
        "command ends with the same bits as an uninterrupted run.",
        command="python -m experiments.reliability.kill_test "
        "--output runs/kills --results experiments/reliability",
        time="Tens of minutes on two cores.",
        setup=f"{content['steps']} steps of `jaxunlearn forget`, a "
        f"checkpoint every {content['save_every']}, {content['devices']} "
        f"simulated devices (mesh {mesh}). {content['arrays_compared']} arrays of "
        "the last checkpoint are compared bit for bit: params, optimizer state and "
        "key.",
        verdict=[
            f"SIGKILL: {kills['identical']} of {kills['runs']} runs ended bit for bit "
            f"as the uninterrupted one; {kills['inside_a_save']} were killed during a "
            "save.",
            f"SIGTERM: {terms['identical']} of {terms['runs']} runs ended bit for bit "
            f"as the uninterrupted one; {terms['exit_75']} exited with status 75.",
            f"The claim {'**holds**' if good else '**fails**'} in these trials.",
        ],
    )
    rows = [[_cell(trial[key]) for key in COLUMNS] for trial in content["trials"]]
    return lines + table(list(COLUMNS.values()), rows)


def _cell(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)
