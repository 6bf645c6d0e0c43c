# Joins this machine to the Slurm cluster as one dynamic node.
#
# The plugin writes "#!/bin/sh" and the SCHLOUDER_* assignments above this text and hands the whole to
# EC2 as user data; cloud-init runs it as root at first boot. Needs: curl >= 7.87, iproute2, munge,
# slurmd >= 22.05. Holds no secret: the munge key comes from the SSM Parameter Store with the rights of
# the instance profile.
set -eu

METADATA=169.254.169.254

explain() {
    code=$?
    if [ "$code" -ne 0 ]; then
        echo "schlouder: $SCHLOUDER_NODE could not join Slurm at $SCHLOUDER_CONTROLLER: $STEP failed ($code)" >&2
        shutdown -h now
    fi
}
trap explain EXIT

fetch() {
    curl -sSf --noproxy '*' --connect-timeout 5 --max-time 30 --retry 5 --retry-connrefused "$@"
}

# The document $1 of the instance metadata service.
metadata() {
    fetch -H "X-aws-ec2-metadata-token: $TOKEN" "http://$METADATA/latest/meta-data/$1"
}

# The value of the string field $1 of a flat JSON object on standard input.
field() {
    tr -d '\n' | sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p"
}

# The value of the SSM parameter $1. The credentials go to curl on standard input: command lines are public.
ssm_parameter() {
    role=$(metadata iam/security-credentials/) || {
        echo 'the instance has no instance profile' >&2
        return 1
    }
    credentials=$(metadata "iam/security-credentials/$role")
    answer=$(
        {
            printf 'user = "%s:%s"\n' "$(echo "$credentials" | field AccessKeyId)" \
                "$(echo "$credentials" | field SecretAccessKey)"
            printf 'header = "X-Amz-Security-Token: %s"\n' "$(echo "$credentials" | field Token)"
        } | fetch --config - \
            --aws-sigv4 "aws:amz:$SCHLOUDER_REGION:ssm" \
            -H 'Content-Type: application/x-amz-json-1.1' \
            -H 'X-Amz-Target: AmazonSSM.GetParameter' \
            --data "{\"Name\":\"$1\",\"WithDecryption\":true}" \
            "$SCHLOUDER_SSM_ENDPOINT"
    )
    echo "$answer" | field Value
}

STEP='reading instance metadata'
TOKEN=$(fetch -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "http://$METADATA/latest/api/token")
address=$(metadata local-ipv4)

STEP="reading the munge key from SSM parameter $SCHLOUDER_MUNGE_KEY_PARAMETER"
install -d -o munge -g munge -m 0700 /etc/munge /var/log/munge /var/lib/munge
install -d -o munge -g munge -m 0755 /run/munge
key=$(ssm_parameter "$SCHLOUDER_MUNGE_KEY_PARAMETER")
(umask 077 && echo "$key" | base64 -d >/etc/munge/munge.key)
[ -s /etc/munge/munge.key ]
chown munge:munge /etc/munge/munge.key

# Jobs must not get at the instance's credentials. All that root needs of them has been read.
STEP='closing the metadata service to users'
ip rule add priority 1 to "$METADATA" uidrange 1-4294967294 prohibit

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

STEP='starting slurmd'
hostname "$SCHLOUDER_NODE"
echo "$address $SCHLOUDER_NODE" >>/etc/hosts
install -d /var/spool/slurmd /var/log/slurm
slurmd -Z -N "$SCHLOUDER_NODE" --conf-server "$SCHLOUDER_CONTROLLER" --conf "$SCHLOUDER_NODE_CONF"
