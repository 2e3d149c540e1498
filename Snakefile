# The study as a graph: every run trains (chapter 03, 06 or 07), is swept over alpha (05), and all rows together give the figures (09).
# A run's folder is named by a hash of parameters, code and data, so what is there is never computed again.
#   snakemake --config study=grid seeds=3 data=/path        (the Makefile's `study` does this)
#   snakemake --executor slurm --jobs 20 --nolock --keep-incomplete --config study=grid gpus=1       (a cluster; see CONTRIBUTING.md)
import shlex

import yaml
from wlsft.status import study_plan, write_plan

STUDY = config.get("study", "emojishift")
DATA = str(config.get("data", "") or "")
RUNS = str(config.get("runs", "") or "runs")
PROCESSES = int(config.get("processes", 1))                                          # of torchrun, for each training run
GPUS = int(config.get("gpus", 0))                                                    # of each process; a scheduler is asked for them
EVERYWHERE = config.get("set") or {}                                                 # Snakemake has parsed it as YAML, or it is text
EVERYWHERE = yaml.safe_load(EVERYWHERE) if isinstance(EVERYWHERE, str) else EVERYWHERE
PLAN = study_plan(f"nbs/studies/{STUDY}.yaml", int(config.get("seeds", 1)), EVERYWHERE, DATA)            # (run, sweep) -> what is asked
RUN = {p.run: p for p in PLAN.values()}
NAMES = write_plan(PLAN, f"{RUNS}/studies/{STUDY}/plan.json")                        # newer than the tables when the study has changed
REPORT = "09_rivals" if any(p.chapter == "07_flyp" for p in PLAN.values()) else "09_comparison"


def together(p: dict) -> str:
    "Train under torchrun first, if asked to; the chapter then finds the run done."
    return f"torchrun --standalone --nproc_per_node {PROCESSES} --no-python wlsft-train {flags(p)} && " if PROCESSES > 1 else ""


def flags(p: dict) -> str:
    "Parameters as wlsft-run wants them, quoted for the shell."
    return " ".join(f"-p {k} {shlex.quote(str(v))}" for k, v in p.items())


wildcard_constraints:
    run=r"[^/]+",
    rows=r"[0-9a-f]+",


localrules: collect,


rule all:
    input: f"figures/{STUDY}/alpha.png", [f"figures/{STUDY}/scatter.png"] if any(p.sweep["deep"] for p in PLAN.values()) else [],


# Two studies may share runs, at the same time: a run's folder has a lock of its own (`only_one`), so whoever comes second waits and finds it done. What is
# there is therefore not deleted beforehand (`update`), nor when a job fails (`--keep-incomplete`: our files are whole or absent), and Snakemake's lock of the
# whole folder is not needed (`--nolock`).
rule train:
    output: update(f"{RUNS}/{{run}}/run.json"), update(f"{RUNS}/{{run}}/theta.safetensors"),
    log: f"{RUNS}/{{run}}/train.log",
    params:
        flags=lambda w: flags(dict(RUN[w.run].params, data=DATA, runs=RUNS)),
        first=lambda w: together(dict(RUN[w.run].params, data=DATA, runs=RUNS)),
        notebook=lambda w: RUN[w.run].chapter,
        note=lambda w: f"{RUNS}/{w.run}/train.progress.json",
        executed=lambda w: f"{RUNS}/{w.run}/train.ipynb",
        omp=lambda w, threads: max(1, threads // PROCESSES),
    threads: PROCESSES
    resources: mem_mb=4000 * PROCESSES, runtime=120, gpu=GPUS * PROCESSES
    shell: "export OMP_NUM_THREADS={params.omp} WLSFT_QUIET=1 WLSFT_PROGRESS={params.note:q}; "
           "({params.first}wlsft-run --lean nbs/{params.notebook}.ipynb {params.executed:q} {params.flags}) > {log:q} 2>&1"


rule sweep:
    input: rules.train.output,
    output: update(f"{RUNS}/{{run}}/rows-{{rows}}.parquet"),
    log: f"{RUNS}/{{run}}/sweep-{{rows}}.log",
    params:
        flags=lambda w, output: flags(dict(PLAN[w.run, w.rows].sweep, run=w.run, study=STUDY, data=DATA, runs=RUNS, scratch=f"{RUNS}/scratch/{w.rows}" if PLAN[w.run, w.rows].sweep["suite"] else "", out=output[0])),
        executed=lambda w: f"{RUNS}/{w.run}/sweep-{w.rows}.ipynb",
    threads: 1
    resources: mem_mb=4000, runtime=120, gpu=GPUS
    shell: "OMP_NUM_THREADS={threads} wlsft-run --lean nbs/05_interpolation.ipynb {params.executed:q} {params.flags} > {log:q} 2>&1"


rule collect:
    input:
        names=NAMES,
        rows=[f"{RUNS}/{run}/rows-{rows}.parquet" for run, rows in PLAN],
    output: f"{RUNS}/studies/{STUDY}/rows.parquet",
    run:
        from wlsft.figures import read_rows
        from wlsft.interpolation import write_rows
        write_rows(read_rows(input.rows).assign(study=STUDY), output[0])                      # a shared run's rows carry the label of whoever swept it


rule figures:
    input: rules.collect.output,
    output: f"figures/{STUDY}/alpha.png",
    log: f"{RUNS}/studies/{STUDY}/figures.log",
    params: executed=f"{RUNS}/studies/{STUDY}/figures.ipynb", flags=lambda w: flags(dict(rows=f"{RUNS}/studies/{STUDY}", out=f"figures/{STUDY}", draws=2000, data=DATA)),
    resources: mem_mb=4000, runtime=30
    shell: "wlsft-run nbs/09_figures.ipynb {params.executed:q} {params.flags} > {log:q} 2>&1"


rule comparison:
    input: rules.collect.output,
    output: f"figures/{STUDY}/scatter.png",
    log: f"{RUNS}/studies/{STUDY}/comparison.log",
    params: executed=f"{RUNS}/studies/{STUDY}/comparison.ipynb", flags=lambda w: flags(dict(rows=f"{RUNS}/studies/{STUDY}", out=f"figures/{STUDY}", draws=2000, data=DATA)),
    resources: mem_mb=4000, runtime=30
    shell: "wlsft-run nbs/{REPORT}.ipynb {params.executed:q} {params.flags} > {log:q} 2>&1"
