# Sixty guests, one after the other, on real Xen: each must start.  For the lab's shell:
#   LAB_OWN_PACE=1 .venv/bin/python -m tests.lab --only xen-pvh --script "$(cat tests/lab/boots.sh)"
. /lab/tree/tests/lab/surroundings.sh
export HOME=/tmp APPPOT_XEN_TYPE=pvh
cd /tmp || exit
failed=0
for number in $(seq 60); do
    timeout 120 python3 -c 'from apppot.host.cli import main; main()' \
        run --hypervisor xen --network none debian-12 true
    status=$?
    echo "$number: $status"
    [ $status -eq 0 ] || failed=$((failed + 1))
done
echo "$failed of 60 failed"
[ $failed -eq 0 ]
