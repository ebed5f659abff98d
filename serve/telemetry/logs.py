"""Log lines on stderr, as text or as JSON. What a line says besides its message comes as `extra={"fields": {...}}`."""

import json
import logging
import re
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]

PLAIN = re.compile(r"[A-Za-z0-9._:/,+-]+")


def configure_logging(log_format: LogFormat) -> None:
    """Warnings of everything, and what the server itself has to tell."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("serve").setLevel(logging.INFO)


class TextFormatter(logging.Formatter):
    """`time level logger: message name=value ...`; values that are not plain words are quoted and escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line with its fields behind it; a field that is None is left out."""
        pairs = (f" {name}={_word(value)}" for name, value in _fields(record).items() if value is not None)
        return super().formatMessage(record) + "".join(pairs)


class JsonFormatter(logging.Formatter):
    """One object per line, its exception included."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; `time` is UTC with milliseconds. Fields stand beside the message."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


def _word(value: object) -> str:
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
