# Joins this machine to the Slurm cluster as one dynamic node.
#
# The plugin writes "#!/bin/sh" and the SCHLOUDER_* assignments above this text and hands the whole, without
# the comments below, to EC2 as user data; cloud-init runs it as root at first boot, and its output goes to
# the console. What the image lacks is installed with apt. Holds no secret: the cluster's key comes from the
# SSM Parameter Store or the Secrets Manager with the rights of the instance profile. A machine that cannot
# join says why and powers off; one whose owner is gone powers off when its lease is over (watch_lease).
set -eu

METADATA=169.254.169.254
METADATA_IPV6=fd00:ec2::254
PROC=/proc
CLOUD_INIT=/var/lib/cloud
NODE_FILE=/run/schlouder-node
NODE='this machine'
REASON=

explain() {
    code=$?
    if [ "$code" -ne 0 ]; then
        reason=${REASON:-"$STEP failed ($code)"}
        echo "schlouder: $NODE could not join Slurm at $SCHLOUDER_CONTROLLER: $reason" >&2
        shutdown -h now
    fi
}
trap explain EXIT

die() {
    REASON=$1
    exit 1
}

# Notes the package $2 as missing if there is no command $1.
need() {
    command -v "$1" >/dev/null || MISSING="$MISSING $2"
}

# Installs packages. First-boot upgrades of the image may hold apt's locks, and mirrors may be out of step.
install_packages() {
    command -v apt-get >/dev/null ||
        die "this image lacks$MISSING, and has no apt-get to install that; use another image"
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    # Debian starts daemons while it installs them, with a key and a configuration of its own making.
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        policy=
    else
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    tries=0
    until apt_get update && apt_get install -y --no-install-recommends "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 10 ] || return 1
        sleep 10
    done
    [ -z "$policy" ] || rm "$policy"
}

apt_get() {
    apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3 -o DPkg::Options::=--force-confold "$@" \
        </dev/null
}

fetch() {
    curl -sSf --noproxy '*' --connect-timeout 5 --max-time 30 --retry 5 --retry-connrefused "$@"
}

# The document $1 of the instance metadata service.
metadata() {
    token=$(fetch -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "http://$METADATA/latest/api/token")
    fetch -H "X-aws-ec2-metadata-token: $token" "http://$METADATA/latest/meta-data/$1"
}

# A program that asks the service $1 at $2 in the region $3 for the secret $4, and writes it decoded.
# The role's credentials come on standard input: command lines are public. Python, which cloud-init needs
# itself, because curl signs the session token only from 7.87 on.
READ_KEY='
import base64, datetime, hashlib, hmac, json, sys, time, urllib.error, urllib.request

service, url, region, name = sys.argv[1:]
role = json.load(sys.stdin)
action, question = {
    "ssm": ("AmazonSSM.GetParameter", {"Name": name, "WithDecryption": True}),
    "secretsmanager": ("secretsmanager.GetSecretValue", {"SecretId": name}),
}[service]
body = json.dumps(question).encode()


def sign(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def request():
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "content-type": "application/x-amz-json-1.1",
        "host": url.split("/")[2],
        "x-amz-date": now,
        "x-amz-security-token": role["Token"],
        "x-amz-target": action,
    }
    names = ";".join(headers)
    lines = [f"{header}:{value}" for header, value in headers.items()]
    canonical = ["POST", "/", "", *lines, "", names, hashlib.sha256(body).hexdigest()]
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    parts = [now[:8], region, service, "aws4_request"]
    key = ("AWS4" + role["SecretAccessKey"]).encode()
    for part in parts:
        key = sign(key, part)
    scope = "/".join(parts)
    signature = sign(key, "\n".join(["AWS4-HMAC-SHA256", now, scope, digest])).hex()
    headers["authorization"] = (
        "AWS4-HMAC-SHA256 Credential=" + role["AccessKeyId"] + "/" + scope
        + ", SignedHeaders=" + names + ", Signature=" + signature
    )
    return urllib.request.Request(url.rstrip("/") + "/", body, headers)


def ask():
    """For two minutes, as long as nobody answers: that is no reason to throw a machine away."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for pause in (1, 2, 4, 8, *[15] * 7, 0):
        try:
            return json.load(opener.open(request(), timeout=30))
        except urllib.error.HTTPError as error:
            failure = error.read().decode(errors="replace")
            if error.code < 500 and "Throttling" not in failure:
                break
        except OSError as error:
            failure = str(error)
        time.sleep(pause)
    sys.exit(f"{action} of {name} at {url}: {failure}")


answer = ask()
if service == "ssm":
    text = answer["Parameter"]["Value"]
else:
    text = answer.get("SecretString") or answer["SecretBinary"]
try:
    sys.stdout.buffer.write(base64.b64decode("".join(text.split()), validate=True))
except ValueError:
    sys.exit(f"{name} is not base64")
'

# Writes the cluster's key to the file $1.
write_key() {
    STEP="reading the cluster's key from $SCHLOUDER_KEY_SERVICE $SCHLOUDER_KEY_NAME"
    role=$(metadata iam/security-credentials/) || die 'the instance has no instance profile'
    credentials=$(metadata "iam/security-credentials/$role")
    (
        umask 077
        printf '%s' "$credentials" | python3 -c "$READ_KEY" "$SCHLOUDER_KEY_SERVICE" \
            "$SCHLOUDER_KEY_ENDPOINT" "$SCHLOUDER_REGION" "$SCHLOUDER_KEY_NAME" >"$1"
    )
    [ -s "$1" ] || die "$SCHLOUDER_KEY_SERVICE $SCHLOUDER_KEY_NAME is empty"
}

start_munged() {
    install -d -o munge -g munge -m 0700 /etc/munge /var/log/munge /var/lib/munge
    install -d -o munge -g munge -m 0755 /run/munge
    write_key /etc/munge/munge.key
    chown munge:munge /etc/munge/munge.key
    STEP='starting munged'
    # The image may have started one, with a key of its own.
    if pkill -x munged; then
        sleep 1
    fi
    setpriv --reuid munge --regid munge --clear-groups munged
    # The cluster's slurm.conf may name a socket of its own (AuthInfo=socket=...); slurmd will look there.
    if [ "$SCHLOUDER_MUNGE_SOCKET" != /run/munge/munge.socket.2 ]; then
        mkdir -p "$(dirname "$SCHLOUDER_MUNGE_SOCKET")"
        ln -sf /run/munge/munge.socket.2 "$SCHLOUDER_MUNGE_SOCKET"
    fi
}

mount_file_systems() {
    while read -r source point options; do
        if [ -n "$source" ]; then
            STEP="mounting $source on $point"
            mkdir -p "$point"
            mount -t nfs -o "$options" "$source" "$point" </dev/null
        fi
    done <<END
$SCHLOUDER_MOUNTS
END
}

# slurmctld may be restarting: that is no reason to throw a machine away.
start_slurmd() {
    STEP='starting slurmd'
    tries=0
    until slurmd -Z -N "$NODE" --conf-server "$SCHLOUDER_CONTROLLER" --conf "$SCHLOUDER_NODE_CONF"; do
        tries=$((tries + 1))
        [ "$tries" -lt 6 ] || die 'slurmd does not start'
        sleep 10
    done
}

# As a client of the cluster; slurmctld may be away.
ask_slurm() {
    SLURM_CONF=/run/slurm/conf/slurm.conf timeout -k 5 15 scontrol "$@" </dev/null
}

# Waits until EC2 announces that it takes this spot machine back, and has Slurm give it no more jobs.
watch_spot() {
    until notice=$(metadata spot/instance-action 2>/dev/null); do
        sleep 5
    done
    when=$(echo "$notice" | tr -d '\n' | sed -n 's/.*"time" *: *"\([^"]*\)".*/\1/p')
    until ask_slurm update "nodename=$NODE" state=drain "reason=schlouder: spot reclaim at $when"; do
        sleep 1
    done
}

# Whole seconds on the one clock here that nobody sets.
uptime() {
    read -r up _ <"$PROC/uptime"
    echo "${up%.*}"
}

# The lease in the comment of the own node record, as its seconds and the comment; nothing if there is none. Only
# what the owner itself writes counts (Lease.text in lease.py), and only numbers.
read_lease() {
    [ -s "$NODE_FILE" ] || return 0
    ask_slurm show node "$(cat "$NODE_FILE")" | sed -nE -e \
        's/^ *Comment=(schlouder run=[^[:space:]]+ lease=(0|[1-9][0-9]{0,8}) at=[0-9]+( kept)?) *$/\2 \1/p'
}

# Whether a job runs here. Newer releases keep one more slurmstepd, for cgroups.
has_job() {
    for comm in "$PROC"/[0-9]*/comm; do
        { read -r name <"$comm"; } 2>/dev/null || continue
        if [ "$name" = slurmstepd ] && ! grep -qs infinity "${comm%comm}cmdline"; then
            return 0
        fi
    done
    return 1
}

# Whether little is left of the paid unit. The meter runs about as long as the first process, whose start
# /proc tells in hundredths of a second.
is_unit_over() {
    [ "$SCHLOUDER_UNIT" -gt 120 ] || return 0
    read -r stat <"$PROC/1/stat"
    # shellcheck disable=SC2086 # fields; the one before the last parenthesis is a name that may have blanks
    set -- ${stat##*) }
    [ $((($(uptime) - ${20} / 100) % SCHLOUDER_UNIT)) -ge $((SCHLOUDER_UNIT - 120)) ]
}

# Powers off unless Slurm has given this machine a job meanwhile.
leave() {
    echo "$(date) the lease is over"
    if [ -s "$NODE_FILE" ]; then
        ask_slurm update "nodename=$(cat "$NODE_FILE")" state=drain 'reason=schlouder: the lease is over'
        sleep 5
    fi
    has_job || shutdown -h now
}

# Ends this machine when its lease is over and no job runs here. Needs neither the cloud's word nor Slurm's: what
# does not answer renews nothing. A lease counts from when its comment was first seen, by this machine's clock.
watch_lease() {
    set +e
    trap '' HUP
    # A job that takes all memory must not end this.
    echo -1000 >/proc/self/oom_score_adj
    seen='' since=$(uptime) lease=$SCHLOUDER_FIRST_LEASE
    while :; do
        pause=$((lease / 20))
        [ "$pause" -le 30 ] || pause=30
        [ "$pause" -ge 1 ] || pause=1
        sleep "$pause"
        told=$(read_lease)
        if [ -n "$told" ] && [ "$told" != "$seen" ]; then
            seen=$told since=$(uptime) lease=${told%% *}
        fi
        if [ $(($(uptime) - since)) -ge "$lease" ] && ! has_job && is_unit_over; then
            leave
        fi
    done
}

# Booted again, this machine would have neither slurmd nor a watch. Not so an image that is made of it.
end_at_reboot() {
    if [ -d "$CLOUD_INIT/scripts/per-boot" ] && [ -d "$CLOUD_INIT/instance" ]; then
        mark=$CLOUD_INIT/instance/schlouder script=$CLOUD_INIT/scripts/per-boot/schlouder
        touch "$mark"
        printf '#!/bin/sh\n[ ! -e %s ] || shutdown -h now\n' "$mark" >"$script"
        chmod 755 "$script"
    fi
}

# A release as a number: 2205 for 22.05.
number() {
    echo "$1" | tr -d .
}

STEP='beginning to watch the lease'
mkdir -p /var/log/slurm
watch_lease </dev/null >>/var/log/slurm/lease.log 2>&1 &
end_at_reboot

STEP='installing packages'
MISSING=
need slurmd slurmd
need scontrol slurm-client
[ "$SCHLOUDER_AUTH" != munge ] || need munged munge
[ -z "$SCHLOUDER_MOUNTS" ] || need mount.nfs nfs-common
need curl curl
need python3 python3
need ip iproute2
need pkill procps
if [ -n "$MISSING" ]; then
    # shellcheck disable=SC2086 # package names, one word each
    install_packages $MISSING
fi

STEP='reading the release of slurmd'
version=$(slurmd -V | sed -n 's/^[^0-9]*\([0-9]*\.[0-9]*\).*/\1/p')
[ -n "$version" ] || die 'slurmd -V tells no release'
if [ "$(number "$version")" -lt "$(number "$SCHLOUDER_OLDEST_SLURMD")" ] ||
    [ "$(number "$version")" -gt "$(number "$SCHLOUDER_NEWEST_SLURMD")" ]; then
    die "slurmd $version of this image does not fit, the controller takes $SCHLOUDER_OLDEST_SLURMD to \
$SCHLOUDER_NEWEST_SLURMD; use another image"
fi

STEP='reading instance metadata'
address=$(metadata local-ipv4)
index=$(metadata ami-launch-index)
for name in $SCHLOUDER_NODES; do
    if [ "$index" -eq 0 ]; then
        NODE=$name
    fi
    index=$((index - 1))
done
[ "$index" -lt 0 ] || die 'the launch has more machines than names'

if [ "$SCHLOUDER_AUTH" = munge ]; then
    start_munged
else
    install -d /etc/slurm
    export SLURM_SACK_KEY=/etc/slurm/slurm.key
    write_key "$SLURM_SACK_KEY"
fi

# Jobs must not get at the instance's credentials. All that root needs of them has been read.
STEP='closing the metadata service to users'
ip rule add priority 1 to "$METADATA" uidrange 1-4294967294 prohibit
if [ -e /proc/net/if_inet6 ]; then
    ip -6 rule add priority 1 to "$METADATA_IPV6" uidrange 1-4294967294 prohibit
fi

mount_file_systems

STEP='naming the machine'
hostname "$NODE"
echo "$address $NODE" >>/etc/hosts
echo "$NODE" >"$NODE_FILE"
install -d /var/spool/slurmd
start_slurmd

if [ "$SCHLOUDER_MARKET" = spot ]; then
    watch_spot </dev/null >>/var/log/slurm/spot.log 2>&1 &
fi
