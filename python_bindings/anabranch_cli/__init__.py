"""The command line `anabranch`. A package of its own, so that a shell's completion and commands that need no layer do
not wait for torch: what needs the library imports it."""
