# The study as a graph: every run is trained, each run is swept over alpha, and all rows together give the figures (chapter 09).
# A run's folder is named by a hash of parameters, code and data, so what is there is never computed again.
#   snakemake --config study=grid seeds=3 data=/path        (the Makefile's `study` does this)
#   snakemake --workflow-profile profiles/slurm --config study=grid gpus=1       (a cluster; see CONTRIBUTING.md)
import shlex

import yaml
from wlsft.study.plan import study_plan, sweep_resources, write_plan


def limit(name: str) -> int:
    "What all jobs of this machine may hold together, 0 where nothing is said; newer Snakemakes wrap the number."
    found = workflow.global_resources.get(name)
    return int(getattr(found, "value", found) or 0)


STUDY = config.get("study", "emojishift")
DATA = str(config.get("data", "") or "")
RUNS = str(config.get("runs", "") or "runs")
PROCESSES = int(config.get("processes", 1))  # of torchrun, for each training run
LOCAL_GPUS = limit("gpu") > 0  # each job takes GPUs that no other job holds
GPUS = int(config.get("gpus", LOCAL_GPUS))  # of each process; a scheduler is asked for them
MEMORY = limit("mem_mb") or 10**9  # a job that asks for more gets all of it
EVERYWHERE = config.get("set") or {}  # Snakemake has parsed it as YAML, or it is text
EVERYWHERE = yaml.safe_load(EVERYWHERE) if isinstance(EVERYWHERE, str) else EVERYWHERE
PLAN = study_plan(f"nbs/studies/{STUDY}.yaml", int(config.get("seeds", 1)), EVERYWHERE, DATA)  # (run, sweep) -> job
RUN = {job.run: job for job in PLAN.values()}
NAMES = write_plan(PLAN, f"{RUNS}/studies/{STUDY}/plan.json")  # newer than the tables when the study has changed
REPORT = "flyp" if any(job.params["method"] == "FLYP" for job in PLAN.values()) else "comparison"
COMPARED = any("probe" in job.sweep["scorers"] for job in PLAN.values())
FOLDS = any(job.params.get("fold") for job in PLAN.values())  # scored on validation concepts alone: rows, and no figures of chapter 09


def parameters(values: dict) -> str:
    "`-p NAME VALUE` for each parameter, quoted for the shell."
    return " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in values.items())


def places(device: str = "") -> str:
    chosen = dict(runs=RUNS, data=DATA, device=device)
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in chosen.items() if value)


def launcher() -> str:
    claim = f"wlsft with-gpus {GPUS * PROCESSES} " if LOCAL_GPUS and GPUS else ""
    return claim + (f"torchrun --standalone --nproc_per_node {PROCESSES} --no-python " if PROCESSES > 1 else "")


def train_command(run: str) -> str:
    return f"{launcher()}wlsft train {parameters(RUN[run].params)} {places(RUN[run].device)}"


def sweep_command(run: str, rows: str, out: str) -> str:
    job = PLAN[run, rows]
    cache = f"--cache {RUNS}/cache/{rows} " if job.sweep["suite"] else ""
    flags = f"{parameters(job.sweep)} --study {STUDY} --out {shlex.quote(out)} {cache}"
    return f"{launcher()}wlsft sweep {shlex.quote(run)} {flags}{places(job.device)}"


def needs(name: str):
    "What a sweep needs of threads, memory or time, by the size of its suite."
    most = MEMORY if name == "mem_mb" else 10**9
    return lambda w: min(most, sweep_resources(PLAN[w.run, w.rows])[name])


def report_flags() -> str:
    return parameters(dict(rows=f"{RUNS}/studies/{STUDY}", out=f"figures/{STUDY}", draws=config.get("draws", 2000), data=DATA))


# Not a `run:` block: that would read this file again in another process, whose names of runs differ if code or files have changed meanwhile.
COLLECT = (
    "import sys; from wlsft.evaluation.stats import read_rows; from wlsft.study.sweep import write_rows; "
    "write_rows(read_rows(sys.argv[3:]).assign(study=sys.argv[1]), sys.argv[2])"
)


wildcard_constraints:
    run=r"[^/]+",
    rows=r"[0-9a-f]+",


localrules: collect,


rule all:
    input:
        f"{RUNS}/studies/{STUDY}/rows.parquet" if FOLDS else f"figures/{STUDY}/alpha.png",
        [f"figures/{STUDY}/scatter.png"] if COMPARED else [],


# Two studies may share runs, at the same time: a run's folder has a lock of its own, so whoever comes second waits and finds it done. What is
# there is therefore not deleted beforehand (`update`), nor when a job fails (`--keep-incomplete`: our files are whole or absent), and Snakemake's
# lock of the whole folder is not needed (`--nolock`).
rule train:
    output: update(f"{RUNS}/{{run}}/run.json"), update(f"{RUNS}/{{run}}/theta.safetensors"),
    log: f"{RUNS}/{{run}}/train.log",
    params:
        command=lambda w: train_command(w.run),
        progress=lambda w: f"{RUNS}/{w.run}/train.progress.json",
        omp=lambda w, threads: max(1, threads // PROCESSES),
    threads: PROCESSES
    priority: 1  # before sweeps: a run that is trained last would be swept alone
    resources: mem_mb=min(MEMORY, 4000 * PROCESSES), runtime=120, gpu=GPUS * PROCESSES
    shell: "OMP_NUM_THREADS={params.omp} WLSFT_QUIET=1 WLSFT_PROGRESS={params.progress:q} {params.command} > {log:q} 2>&1"


def other_run(w) -> list[str]:
    "The second run of a soup or Model Stock."
    other = PLAN[w.run, w.rows].other
    return [f"{RUNS}/{other}/theta.safetensors"] if other else []


rule sweep:
    input: rules.train.output, other_run,
    output: update(f"{RUNS}/{{run}}/rows-{{rows}}.parquet"),
    log: f"{RUNS}/{{run}}/sweep-{{rows}}.log",
    params:
        command=lambda w, output: sweep_command(w.run, w.rows, output[0]),
        progress=lambda w: f"{RUNS}/{w.run}/sweep-{w.rows}.progress.json",
        omp=lambda w, threads: max(1, threads // PROCESSES),
    threads: needs("threads")
    resources: mem_mb=needs("mem_mb"), runtime=needs("runtime"), gpu=GPUS * PROCESSES
    shell: "OMP_NUM_THREADS={params.omp} WLSFT_QUIET=1 WLSFT_PROGRESS={params.progress:q} {params.command} > {log:q} 2>&1"


rule collect:
    input:
        names=NAMES,
        rows=[f"{RUNS}/{run}/rows-{rows}.parquet" for run, rows in PLAN],
    output: f"{RUNS}/studies/{STUDY}/rows.parquet",
    params: program=COLLECT
    shell: "python -c {params.program:q} {STUDY} {output:q} {input.rows:q}"  # the rows of a shared run carry the label of whoever swept it


rule figures:
    input: rules.collect.output,
    output: f"figures/{STUDY}/alpha.png",
    log: f"{RUNS}/studies/{STUDY}/figures.log",
    params: executed=f"{RUNS}/studies/{STUDY}/figures.ipynb", flags=report_flags(),
    resources: mem_mb=min(MEMORY, 4000), runtime=30
    shell: "wlsft notebook nbs/09_figures.ipynb {params.executed:q} {params.flags} > {log:q} 2>&1"


rule comparison:
    input: rules.collect.output,
    output: f"figures/{STUDY}/scatter.png",
    log: f"{RUNS}/studies/{STUDY}/comparison.log",
    params: executed=f"{RUNS}/studies/{STUDY}/comparison.ipynb", flags=report_flags(),
    resources: mem_mb=min(MEMORY, 4000), runtime=30
    shell: "wlsft notebook nbs/reports/{REPORT}.ipynb {params.executed:q} {params.flags} > {log:q} 2>&1"
