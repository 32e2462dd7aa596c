"""--deterministic in the programs: it reaches the process that trains, and a resume keeps it."""

from programs import run_program

SHOW = """
launched = {owner}.launch
def launch(*arguments):
    launched(*arguments)
    import torch
    print("deterministic:", torch.are_deterministic_algorithms_enabled(), flush=True)
{owner}.launch = launch
"""
FLAGS = ["-p", "zero2", "-x", "fp32", "-b", 4, "--max_steps", 4, "-i", 2]
BENCHMARK = "-c test -p zero2 -l 32 -b 1 -s 3 -i 1 --mixed_precision fp32 --deterministic"


def test_a_run_and_its_resume(pretrain, start):
    """finetune.py shares pretrain.py's session."""
    run = pretrain(*FLAGS, "--deterministic", change=SHOW.format(owner="training.session"))
    assert "deterministic: True" in run.stdout
    (run.save_dir / "epoch0-step4").rename(run.folder / "later")
    with start(*FLAGS, "-f", "latest", folder=run.folder) as resumed:
        resumed.wait()
    line = "--load: --deterministic was True in the checkpoint and is False now; --allow_changes resumes anyway"
    assert line in resumed.stderr


def test_benchmark():
    arguments = ["benchmark.py", *BENCHMARK.split()]
    patched = f"import sys, benchmark\n{SHOW.format(owner='benchmark')}\nsys.argv = {arguments}\nbenchmark.main()"
    run = run_program(patched)
    assert "deterministic: True" in run.stdout, run.stderr
