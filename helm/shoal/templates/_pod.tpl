{{/* Metadata of a pod template. Takes {root, role, group}. The checksum makes a changed config a new Ray cluster. */}}
{{- define "shoal.podMetadata" -}}
labels:
  {{- include "shoal.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .role }}
annotations:
  shoal.dev/config-checksum: {{ include "shoal.config" .root | sha256sum }}
  {{- with .group.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Everything of a pod spec but its container. Takes {root, role, group}. */}}
{{- define "shoal.podSpec" -}}
{{- $v := .root.Values -}}
serviceAccountName: {{ include "shoal.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $v.termination.gracePeriodSeconds }}
{{- with $v.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- toYaml $v.podSecurityContext | nindent 2 }}
  seccompProfile:
    type: RuntimeDefault
{{- with .group.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "shoal.name" .root }}-config
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ .group.sharedMemory }}
  - name: ray
    emptyDir: {}
  {{- if $v.model.volume }}
  - name: model
    {{- toYaml $v.model.volume | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* The Ray container, less name, ports and probes. Takes {root, role, group}. */}}
{{- define "shoal.container" -}}
{{- $v := .root.Values -}}
{{- $worker := ne .role "head" -}}
{{- $cuda := eq $v.config.cell.device "cuda" -}}
image: {{ include "shoal.image" .root }}
imagePullPolicy: {{ $v.image.pullPolicy }}
env:
  - name: RAY_USAGE_STATS_ENABLED
    value: "0"
  {{- /* deploy/launch/ray_runtime.py and cluster/device.py say why; they are read when Ray and torch are loaded. */}}
  - name: RAY_SERVE_USE_GRPC_BY_DEFAULT
    value: "1"
  - name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD
    value: "0"
  - name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP
    value: "0"
  - name: OMP_WAIT_POLICY
    value: PASSIVE
  - name: GOMP_SPINCOUNT
    value: "10000"
  - name: GLIBC_TUNABLES
    value: glibc.malloc.hugetlb=1
  {{- with .group.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
lifecycle:
  preStop:
    exec:
      command: ["sleep", {{ $v.termination.preStopSleepSeconds | toString | quote }}]
{{- $extra := dict -}}
{{- if and $worker $cuda }}{{- $_ := set $extra $v.gpu.resourceName .group.ranksPerPod }}{{- end -}}
{{- if and $worker $v.rdma.enabled }}{{- $_ := set $extra $v.rdma.resourceName 1 }}{{- end }}
resources:
  requests:
    {{- toYaml (merge (dict) $extra (.group.resources.requests | default dict)) | nindent 4 }}
  limits:
    {{- toYaml (merge (dict) $extra (.group.resources.limits | default dict)) | nindent 4 }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: ["ALL"]
    {{- if and $worker $v.rdma.enabled }}
    add: ["IPC_LOCK"]
    {{- end }}
volumeMounts:
  - name: config
    mountPath: /etc/shoal
    readOnly: true
  - name: shared-memory
    mountPath: /dev/shm
  - name: ray
    mountPath: /tmp/ray
  {{- if $v.model.volume }}
  - name: model
    mountPath: {{ $v.model.mountPath }}
    readOnly: true
  {{- end }}
{{- end -}}

{{/*
One worker group. Takes {root, role, group}. Without an autoscaler KubeRay demands minReplicas and maxReplicas.
KubeRay's own readiness of a worker asks for a Serve proxy, which an expert pod never has: it gets the raylet's instead.
*/}}
{{- define "shoal.workerGroup" -}}
groupName: {{ .role }}
replicas: {{ .group.replicas }}
minReplicas: {{ .group.replicas }}
maxReplicas: {{ .group.replicas }}
rayStartParams:
  resources: {{ printf "\"{\\\"shoal_%s\\\": %d}\"" .role (int .group.ranksPerPod) | squote }}
template:
  metadata:
    {{- include "shoal.podMetadata" . | nindent 4 }}
  spec:
    {{- include "shoal.podSpec" . | nindent 4 }}
    containers:
      - name: ray-worker
        {{- include "shoal.container" . | nindent 8 }}
        {{- if eq .role "attention" }}
        ports:
          - name: serve
            containerPort: 8000
          - name: serve-grpc
            containerPort: 9000
        {{- else }}
        readinessProbe:
          exec:
            command:
              - bash
              - -c
              - wget --tries 1 -T 4 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success
          initialDelaySeconds: 10
          periodSeconds: 5
          timeoutSeconds: 5
          failureThreshold: 10
        {{- end }}
{{- end -}}
