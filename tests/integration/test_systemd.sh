#!/bin/bash
# The packaged unit under a real service manager: systemd as the first process of a PID
# namespace of its own. Usage: test_systemd.sh KVGATED SOURCE_FOLDER KVGATECTL
# Exit 77 where no such namespace can be made.
set -euo pipefail

kvgated=$1 source=$2 kvgatectl=$3
manager=/lib/systemd/systemd

skip() {
	echo "skipped: $*" >&2
	exit 77
}

[ "$(id -u)" = 0 ] || skip "needs root for a PID namespace"
[ -x "$manager" ] || skip "no $manager"
command -v systemctl >/dev/null || skip "no systemctl"
unshare --fork --pid --mount --mount-proc --kill-child true 2>/dev/null || skip "no PID namespace here"

dir=$(mktemp -d "${TMPDIR:-/tmp}/kvg-systemd.XXXXXX")
trap 'rm -rf -- "$dir"' EXIT

# The service sees neither /tmp nor /home nor perhaps the build folder, so all goes to the namespace's own /run.
cat >"$dir/enter" <<'ENTER'
#!/bin/bash
set -euo pipefail
dir=$1 kvgated=$2 source=$3 kvgatectl=$4
mkdir "$dir/bin"
cp -- "$kvgated" "$dir/bin/kvgated"
cp -- "$kvgatectl" "$dir/bin/kvgatectl"
cp -- "$source/packaging/kvgated.conf" "$dir/kvgated.conf"
mount -t tmpfs -o mode=0755 none /run
mount -t tmpfs -o mode=0755 none /var/lib
mkdir -p /run/kvg-test /run/systemd/system /run/dbus
mount --bind "$dir" /run/kvg-test
chmod 0755 "$dir" "$dir/bin" "$dir/bin/kvgated"
chmod 0644 "$dir/kvgated.conf"
units=/run/systemd/system
sed -e 's,/usr/sbin/kvgated,/run/kvg-test/bin/kvgated,' -e 's,/etc/kvgate/kvgated.conf,/run/kvg-test/kvgated.conf,' \
	-e 's,^User=.*,User=nobody,' -e 's,^Group=.*,Group=nogroup,' \
	-e 's,^\[Unit\],[Unit]\nDefaultDependencies=no,' "$source/packaging/kvgated.service" >$units/kvgated.service
mkdir $units/kvgated.service.d
# The leak check at the end wants ptrace(2), which the unit forbids.
printf '[Service]\nEnvironment=ASAN_OPTIONS=detect_leaks=0:exitcode=99 TSAN_OPTIONS=exitcode=99\n' \
	>$units/kvgated.service.d/sanitizer.conf
cat >$units/kvg-test.service <<'UNIT'
[Unit]
DefaultDependencies=no
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=/run/kvg-test/check
StandardOutput=file:/run/kvg-test/output
StandardError=inherit
TimeoutStartSec=50
UNIT
exec env -i PATH="$PATH" container=kvgate-test /lib/systemd/systemd --system --unit=kvg-test.service --log-target=null --show-status=no
ENTER

cat >"$dir/check" <<'CHECK'
#!/bin/bash
# Runs as a unit of the namespace's own manager.
set -euo pipefail
trap 'echo "failed at line $LINENO"; systemctl status --no-pager --full kvgated.service || true' ERR
property() { systemctl show --property="$1" --value kvgated.service; }
expect() {
	[ "$2" = "$3" ] && return
	echo "$1 is \"$2\", not \"$3\""
	false
}

for round in 1 2; do
	systemctl start kvgated.service
	expect "is-active" "$(systemctl is-active kvgated.service)" active
	status=$(property StatusText)
	[ -n "$status" ]
	systemctl status --no-pager kvgated.service | grep -F "Status: \"$status\""
	expect "owner of the socket" "$(stat -c %u /run/kvgate/default.sock)" "$(id -u nobody)"
	[ -S /run/kvgate/admin.sock ]
	systemctl stop kvgated.service
	expect "Result" "$(property Result)" success
	expect "ExecMainStatus" "$(property ExecMainStatus)" 0
	expect "is-active" "$(systemctl is-active kvgated.service || true)" inactive
	[ ! -e /run/kvgate ] # as after a reboot
done

# Budgets that were set outlive that.
ctl() { /run/kvg-test/bin/kvgatectl "$@"; }
systemctl start kvgated.service
ctl budget get default | grep -x 'device.max *1.0 GiB'
ctl budget set default device.max=512M | grep -x 'device.max *512.0 MiB'
expect "owner of the budgets" "$(stat -c %u /var/lib/kvgate/budgets.conf)" "$(id -u nobody)"
systemctl stop kvgated.service
[ ! -e /run/kvgate ]
systemctl start kvgated.service
ctl budget get default | grep -x 'device.max *512.0 MiB'
ctl budget reset default | grep -x 'device.max *1.0 GiB'
systemctl stop kvgated.service

# It comes back after a crash by itself: wait for the manager to say so.
systemctl start kvgated.service
first=$(property MainPID)
systemctl kill --signal=SIGKILL kvgated.service
deadline=$((SECONDS + 20))
until [ "$(property MainPID)" != "$first" ] && [ "$(systemctl is-active kvgated.service || true)" = active ]; do
	[ "$SECONDS" -lt "$deadline" ]
done
systemctl stop kvgated.service
expect "Result" "$(property Result)" success
echo passed >/run/kvg-test/result
CHECK
chmod 0755 "$dir/enter" "$dir/check"

timeout --kill-after=5 80 unshare --fork --pid --mount --mount-proc --kill-child \
	"$dir/enter" "$dir" "$kvgated" "$source" "$kvgatectl" </dev/null >"$dir/manager" 2>&1 || true
[ -e "$dir/output" ] || skip "systemd does not start here: $(tail -n 3 "$dir/manager")"
cat -- "$dir/output"
[ "$(cat -- "$dir/result" 2>/dev/null)" = passed ]
