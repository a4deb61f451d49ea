"""What a run logs.

    step.py         metrics of the model: add one here
    throughput.py   tokens/s, TFLOP/s, MFU, memory; flops.py counts what a token costs
    routing.py      expert load
    recorder.py     where it all goes: metrics_file.py, terminal.py, tracking.py (W&B) with
                    artifacts.py, or tensorboard.py

`terminal.py` chooses what a line on the terminal shows.
"""
