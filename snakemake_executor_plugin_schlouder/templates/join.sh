# Joins this machine to the Slurm cluster as one dynamic node.
#
# The plugin writes "#!/bin/sh" and the SCHLOUDER_* assignments above this text and hands the whole to
# EC2 as user data; cloud-init runs it as root at first boot. Needs: curl >= 7.87, munge, slurmd >= 22.05.
# Holds no secret: the munge key comes from the SSM Parameter Store with the rights of the instance profile.
set -eu

IMDS=http://169.254.169.254/latest

explain() {
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "schlouder: $SCHLOUDER_NODE could not join Slurm at $SCHLOUDER_CONTROLLER: $STEP failed ($code)" >&2
        shutdown -h now
    fi
}
trap explain EXIT

imds() {
    curl -sSf --retry 5 --retry-connrefused -H "X-aws-ec2-metadata-token: $TOKEN" "$IMDS/meta-data/$1"
}

# The value of one string field of a flat JSON object on standard input.
field() {
    sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p" | head -n 1
}

# Reads the parameter $1. Credentials go to curl on standard input: a command line is public (ps).
ssm_parameter() {
    role=$(imds iam/security-credentials/) || {
        echo "the instance has no instance profile" >&2
        return 1
    }
    credentials=$(imds "iam/security-credentials/$role" | tr -d '\n')
    {
        printf 'user = "%s:%s"\n' "$(echo "$credentials" | field AccessKeyId)" \
            "$(echo "$credentials" | field SecretAccessKey)"
        printf 'header = "X-Amz-Security-Token: %s"\n' "$(echo "$credentials" | field Token)"
    } | curl -sSf --retry 5 --retry-connrefused --config - \
        --aws-sigv4 "aws:amz:$SCHLOUDER_REGION:ssm" \
        -H 'Content-Type: application/x-amz-json-1.1' \
        -H 'X-Amz-Target: AmazonSSM.GetParameter' \
        --data "{\"Name\":\"$1\",\"WithDecryption\":true}" \
        "$SCHLOUDER_SSM_ENDPOINT" | tr -d '\n' | field Value
}

STEP='reading instance metadata'
TOKEN=$(curl -sSf --retry 5 --retry-connrefused -X PUT \
    -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$IMDS/api/token")
imds instance-id >/dev/null

STEP="reading the munge key from SSM parameter $SCHLOUDER_MUNGE_KEY_PARAMETER"
install -d -o munge -g munge -m 0700 /etc/munge /var/log/munge /var/lib/munge
install -d -o munge -g munge -m 0755 /run/munge
(umask 077 && ssm_parameter "$SCHLOUDER_MUNGE_KEY_PARAMETER" | base64 -d >/etc/munge/munge.key)
[ -s /etc/munge/munge.key ]
chown munge:munge /etc/munge/munge.key

STEP='starting munged'
pkill -x munged || true
setpriv --reuid munge --regid munge --clear-groups munged
# The cluster's slurm.conf may name a socket of its own (AuthInfo=socket=...); slurmd will look there.
if [ "$SCHLOUDER_MUNGE_SOCKET" != /run/munge/munge.socket.2 ]; then
    mkdir -p "$(dirname "$SCHLOUDER_MUNGE_SOCKET")"
    ln -sf /run/munge/munge.socket.2 "$SCHLOUDER_MUNGE_SOCKET"
fi

STEP='starting slurmd'
hostname "$SCHLOUDER_NODE"
install -d /var/spool/slurmd /var/log/slurm
slurmd -Z -N "$SCHLOUDER_NODE" --conf-server "$SCHLOUDER_CONTROLLER" --conf "$SCHLOUDER_NODE_CONF"
