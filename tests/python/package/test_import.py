"""What `import anabranch` brings with it."""

import subprocess
import sys


def test_the_compiler_is_imported_only_where_something_is_compiled():
    program = "import anabranch, sys; print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
