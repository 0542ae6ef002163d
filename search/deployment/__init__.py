"""From a policy to what runs on a device: ONNX files, runtimes, profiles, and checks of what was promised."""
