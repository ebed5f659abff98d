"""A call in the tags of Qwen3-Coder, read as it comes; its parameters become one JSON object.

<function=weather>
<parameter=city>
Oslo
</parameter>
</function>
"""

from serve.parsing.parameter_call import MAX_NAME, ParameterCall
from serve.parsing.tags import find_first

FUNCTION = "<function="
_PARAMETER, _END_PARAMETER, _END_FUNCTION = "<parameter=", "</parameter>", "</function>"


class XmlCall(ParameterCall):
    """It counts from its function's name on."""

    end_value = _END_PARAMETER
    in_lines = True

    def _read_tag(self, text: str, at: int) -> int | None:
        start = len(text) - len(text[at:].lstrip())
        tags = (_PARAMETER, _END_FUNCTION, self._closer) if self.is_call else (FUNCTION,)
        for tag in tags:
            if text.startswith(tag, start):
                return self._follow(tag, text, start + len(tag))
        if any(tag.startswith(text[start:]) for tag in tags):
            return None
        if not self.is_call:
            self.status = "failed"
            return at
        end = start + find_first(text[start:], tags).start
        self._aside += text[at:end].rstrip()
        return end

    def _follow(self, tag: str, text: str, at: int) -> int | None:
        if tag in (_END_FUNCTION, self._closer):
            self._end_call()
            return at if tag == _END_FUNCTION else at - len(tag)
        end = text.find(">", at, at + MAX_NAME)
        if end < 0 and len(text) - at < MAX_NAME:
            return None
        name = text[at : max(at, end)].strip()
        if tag == FUNCTION:
            return end + 1 if self._begin_call(name) else at
        if not name:
            self._aside += tag
            return at
        self._begin_value(name)
        return end + 1
