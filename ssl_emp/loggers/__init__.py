"""Where else a run is shown: wandb, MLflow and trackio (TensorBoard is a part of ssl_emp/run/report.py).

Each has a process of its own (`serve`), which reads what the run directory holds and the logger lacks, and
tells the logger. The training process only says that there is news (`feed`): it never waits for a logger, and
one that fails, hangs, asks for a password or prints does so elsewhere.

    training process    RUN/metrics.jsonl, …  ->  process of a logger  ->  wandb | mlflow | trackio
      Feed.news()  ------ one byte ------------->  Delivery.rows()

Nothing in here imports torch.
"""
