package main

import "text/template"

// settings are what the templates of the configuration files see.
type settings struct {
	Dir               string // for files of the proxy's own
	Listen, Admin     string
	Cert, Key, Bundle string // of the proxy
	CA, ServerName    string // of the backends
	Backends          []string
	Threads           int
	Collector         string // URL of one for OTLP
}

// settings fills in what a proxy of this lab needs to know.
func (l *lab) settings(listen, admin string) settings {
	return settings{
		Dir:    l.dir,
		Listen: listen, Admin: admin,
		Cert: l.pki.proxyCert, Key: l.pki.proxyKey, Bundle: l.pki.proxyBundle,
		CA: l.pki.ca, ServerName: serverName,
		Backends: l.backends,
		Threads:  l.threads,

		Collector: l.collector,
	}
}

// balancerConfig is ours as it comes, apart from where it listens.
const balancerConfig = `listen: "{{.Listen}}"
admin:
  listen: "{{.Admin}}"
tls:
  certFile: "{{.Cert}}"
  keyFile: "{{.Key}}"
backends:
  caFile: "{{.CA}}"
  serverName: {{.ServerName}}
  servers:
{{- range .Backends}}
    - address: "{{.}}"
{{- end}}
log:
  level: warn
`

// All proxies verify their backends, tell them the client's address, send a
// request to the backend that has the fewest, end no watch, and keep no access
// log; those that can, check their backends once a second. Cipher and curve
// are pinned where a proxy lets itself be told, and on all legs by the other
// end: by h2load or clientTLS, and by the backends.
var (
	balancerTemplate = template.Must(template.New(ours).Parse(balancerConfig))
	// What can be switched off is.
	bareTemplate = template.Must(template.New(oursBare).Parse(balancerConfig + `
sourceLimits:
  connections: 0
  unfinished: 0
  resetBurst: 0
  controlBurst: 0
`))
	// What tells of requests is switched on, for all of them but the traces, which are of one
	// in a hundred.
	toldTemplate = template.Must(template.New(oursTold).Parse(balancerConfig + `
accessLog:
  output: "{{.Dir}}/access.log"
  healthChecks: true
otlp:
  endpoint: "{{.Collector}}"
  traceRatio: 0.01
  metricsInterval: 15s
`))

	haproxyTemplate = template.Must(template.New(reference).Parse(`global
    nbthread {{.Threads}}
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    ssl-default-bind-curves X25519
    ssl-default-server-options ssl-min-ver TLSv1.3
    ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    option forwardfor
    http-reuse always
frontend clients
    bind {{.Listen}} ssl crt {{.Bundle}} alpn h2
    default_backend apiservers
backend apiservers
    balance leastconn
    option httpchk GET /readyz
    default-server check check-alpn h2 check-proto h2 check-sni {{.ServerName}} inter 1s ssl verify required ca-file {{.CA}} sni str({{.ServerName}}) verifyhost {{.ServerName}} alpn h2
{{- range $i, $address := .Backends}}
    server apiserver{{$i}} {{$address}}
{{- end}}
`))

	// A buffer of 16k is a TLS record; with the usual 4k or 8k large bodies cost
	// more. keepalive_requests would end connections after 1,000.
	nginxTemplate = template.Must(template.New("nginx").Parse(`daemon off;
worker_processes {{.Threads}};
worker_rlimit_nofile 16000;
pid {{.Dir}}/nginx.pid;
events {
    worker_connections 8000;
}
http {
    access_log off;
    client_body_temp_path {{.Dir}}/nginx-body;
    proxy_temp_path {{.Dir}}/nginx-proxy;
    fastcgi_temp_path {{.Dir}}/nginx-fastcgi;
    uwsgi_temp_path {{.Dir}}/nginx-uwsgi;
    scgi_temp_path {{.Dir}}/nginx-scgi;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    upstream apiservers {
        least_conn;
{{- range .Backends}}
        server {{.}};
{{- end}}
        keepalive 1000;
        keepalive_requests 1000000000;
    }
    server {
        listen {{.Listen}} ssl http2 reuseport;
        ssl_certificate {{.Cert}};
        ssl_certificate_key {{.Key}};
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
        ssl_ecdh_curve X25519;
        location / {
            proxy_pass https://apiservers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_buffering off;
            proxy_buffer_size 16k;
            proxy_buffers 8 16k;
            proxy_read_timeout 1h;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
            proxy_ssl_conf_command Groups X25519;
            proxy_ssl_server_name on;
            proxy_ssl_name {{.ServerName}};
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {{.CA}};
        }
    }
}
`))

	caddyTemplate = template.Must(template.New("caddy").Parse(`{
	admin off
	auto_https off
	servers {
		protocols h1 h2
	}
}
https://{{.Listen}} {
	bind 127.0.0.1
	tls {{.Cert}} {{.Key}} {
		protocols tls1.3
		curves x25519
	}
	reverse_proxy{{range .Backends}} https://{{.}}{{end}} {
		lb_policy least_conn
		flush_interval -1
		health_uri /readyz
		health_interval 1s
		transport http {
			versions 2
			compression off
			tls_server_name {{.ServerName}}
			tls_trusted_ca_certs {{.CA}}
		}
	}
}
`))
)
