"""Before any test module imports torch: where torch_npu is installed without CANN, that works only after bevfn's import."""

import bevfn  # noqa: F401
