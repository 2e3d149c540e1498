# The study as a graph: every run trains (chapter 03, 06 or 07), is swept over alpha (05), and all rows together give the figures (09).
# A run's folder is named by a hash of parameters, code and data, so what is there is never computed again.
#   snakemake --config study=grid seeds=3 data=/path        (the Makefile's `study` does this)
import yaml
from wlsft.flyp import chapter_of, name_of
from wlsft.study import check_range, expand_study

STUDY = config.get("study", "emojishift")
DATA = str(config.get("data", "") or "")
RUNS = str(config.get("runs", "") or "runs")
PROCESSES = int(config.get("processes", 1))                                          # of torchrun, for each training run
EVERYWHERE = config.get("set") or {}                                                 # Snakemake has parsed it as YAML, or it is text
EVERYWHERE = yaml.safe_load(EVERYWHERE) if isinstance(EVERYWHERE, str) else EVERYWHERE
SPEC = expand_study(f"nbs/studies/{STUDY}.yaml", check_range("seeds", int(config.get("seeds", 1)), 1, 100, integer=True), EVERYWHERE)
SUITES = [p.get("suite", "") if "method" in p else p.pop("suite", "") for p in SPEC]     # chapters 06 and 07 train on a suite's images
NAMES = [name_of(p, DATA) for p in SPEC]
STEPS = {n: p.pop("steps", 10) for n, p in zip(NAMES, SPEC)}                         # of alpha; a run may ask for fewer
DEEP = {n: p.pop("deep", False) for n, p in zip(NAMES, SPEC)}                        # probes and distortion along alpha
TOLERANCE = {n: p.pop("tolerance", 0.0) for n, p in zip(NAMES, SPEC)}                 # of features between alphas; 0: every alpha is computed
SUITE = dict(zip(NAMES, SUITES))
PARAMS = dict(zip(NAMES, SPEC))
REPORT = "09_rivals" if any(chapter_of(p) == "07_flyp" for p in SPEC) else "09_comparison"


def together(p: dict) -> str:
    "Train under torchrun first, if asked to; the chapter then finds the run done."
    return f"torchrun --standalone --nproc_per_node {PROCESSES} --no-python wlsft-train {flags(p)} && " if PROCESSES > 1 else ""


def flags(p: dict) -> str:
    "Parameters as wlsft-run wants them; values are YAML."
    return " ".join(f"-p {k} '{v}'" for k, v in p.items())


wildcard_constraints:
    run=r"[^/]+",


localrules: collect,


rule all:
    input: f"figures/{STUDY}/alpha.png", [f"figures/{STUDY}/scatter.png"] if any(DEEP.values()) else [],


rule train:
    output: f"{RUNS}/{{run}}/run.json", f"{RUNS}/{{run}}/theta.safetensors",
    log: f"{RUNS}/{{run}}/train.log",
    params: lambda w: flags(dict(PARAMS[w.run], study=STUDY, data=DATA, runs=RUNS)), first=lambda w: together(dict(PARAMS[w.run], data=DATA, runs=RUNS)), notebook=lambda w: chapter_of(PARAMS[w.run]),
    threads: 1
    resources: mem_mb=4000, runtime=120
    shell: "export OMP_NUM_THREADS={threads}; {params.first}wlsft-run nbs/{params.notebook}.ipynb {RUNS}/{wildcards.run}/train.ipynb {params[0]} > {log} 2>&1"


rule sweep:
    input: rules.train.output,
    output: f"{RUNS}/{{run}}/rows.parquet",
    log: f"{RUNS}/{{run}}/sweep.log",
    params: lambda w: flags(dict(run=w.run, study=STUDY, steps=STEPS[w.run], cells=STEPS[w.run] == 10, deep=DEEP[w.run], tolerance=TOLERANCE[w.run], data=DATA, runs=RUNS, suite=SUITE[w.run], scratch=f"{RUNS}/scratch" if SUITE[w.run] else "")),
    threads: 1
    resources: mem_mb=4000, runtime=120
    shell: "OMP_NUM_THREADS={threads} wlsft-run nbs/05_interpolation.ipynb {RUNS}/{wildcards.run}/sweep.ipynb {params} -p out {output} > {log} 2>&1"


rule collect:
    input: expand(f"{RUNS}/{{run}}/rows.parquet", run=PARAMS),
    output: f"{RUNS}/studies/{STUDY}/rows.parquet",
    run:
        from wlsft.figures import read_rows
        from wlsft.interpolation import write_rows
        write_rows(read_rows(input), output[0])


rule figures:
    input: rules.collect.output,
    output: f"figures/{STUDY}/alpha.png",
    log: f"{RUNS}/studies/{STUDY}/figures.log",
    params: lambda w: flags(dict(rows=f"{RUNS}/studies/{STUDY}", out=f"figures/{STUDY}", draws=2000, data=DATA)),
    shell: "wlsft-run nbs/09_figures.ipynb {RUNS}/studies/{STUDY}/figures.ipynb {params} > {log} 2>&1"


rule comparison:
    input: rules.collect.output,
    output: f"figures/{STUDY}/scatter.png",
    log: f"{RUNS}/studies/{STUDY}/comparison.log",
    params: lambda w: flags(dict(rows=f"{RUNS}/studies/{STUDY}", out=f"figures/{STUDY}", draws=2000, data=DATA)),
    shell: "wlsft-run nbs/{REPORT}.ipynb {RUNS}/studies/{STUDY}/comparison.ipynb {params} > {log} 2>&1"
