"""What cannot be evaluated."""


class EvalError(ValueError):
    """Input that cannot be evaluated. The message is one line, `what. fix: how`."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}. fix: {fix}")
