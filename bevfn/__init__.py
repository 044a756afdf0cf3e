"""Bird's-eye-view 3D detectors as stateless functions; see README.md."""
