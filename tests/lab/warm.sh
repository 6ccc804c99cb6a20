# What a kept machine saves on real KVM.  For the lab's shell:
#   LAB_PROCESSORS=2 .venv/bin/python -m tests.lab --only kvm --script "$(cat tests/lab/warm.sh)"
export PYTHONPATH=/lab/tree/tests/typeroot PYTHONPYCACHEPREFIX=/tmp/compiled HOME=/tmp
export APPPOT_POT=/lab/pot APPPOT_SITE_STORE=/lab/site APPPOT_HYPERVISOR=kvm
export APPPOT_HELLO_TIMEOUT=10m APPPOT_HEARTBEAT_LIMIT=10m
# The benchmarks look for the program beside their Python.
mkdir -p /tmp/bin
ln -sf /usr/bin/python3 /tmp/bin/python3
printf '#!/usr/bin/python3\nfrom apppot.host.cli import main\nmain()\n' >/tmp/bin/apppot
chmod 755 /tmp/bin/apppot
cd /lab/tree && exec /tmp/bin/python3 benchmarks/run.py --only warm
