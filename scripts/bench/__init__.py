"""What is measured, and how it gets into the documents.

A command of more than one file is a folder, in which `__main__.py` is the command.

    train/        training speed of several stacks: __main__.py plans, sitting.py has each measured,
                  in processes that process.py starts, and rows.py says what each field of a row is
    measure/      one stack, in those processes: __main__.py builds it, window.py times its steps,
                  first_failure.py says why where one rank fails and the others wait for it,
                  waiting.py lets ranks wait until they are asked, or nobody is left who would
    pairs.py      what a layout costs a step: two paths in turn on one model
    layer/        one MoE layer in all paths: setup.py builds it, profile.py counts its kernels
    kernels/      single kernels: timing.py times each, a file a family calls them
    checkpoint/   how long a save stops training; disk.py, how fast a disk takes it
    trace.py      where the time of a traced step goes, by kind of kernel
    readme.py     tables and pictures of README.md and docs/*.md, rendered from docs/results/
    plots.py      one picture alone

They share:

    stacks/       what train, measure and pairs train: names and flags, ours, stock megatron-core
    tables/       a results file as a Markdown table, a file for the larger kinds
    results.py    what all results files have, medians and intervals
    machine.py    machine, versions and commit of a results file
    command.py    arguments, bad input in one line, process groups
"""
