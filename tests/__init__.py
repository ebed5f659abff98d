from tests import typecheck

__all__ = ["typecheck"]
