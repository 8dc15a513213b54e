"""The rule of each claim: pydantic models of ``study.claim``, and its check against the study."""
