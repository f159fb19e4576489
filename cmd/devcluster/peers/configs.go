package peers

import "text/template"

// serverName is a name in the certificate of every apiserver.
const serverName = "kubernetes"

var (
	haproxyTemplate = template.Must(template.New("haproxy").Parse(`defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout check 2s
    option forwardfor
    option redispatch
    retries 3
    http-reuse always
frontend clients
    bind {{.Listen}} ssl crt {{.Bundle}} alpn h2,http/1.1
    default_backend apiservers
backend apiservers
    balance leastconn
    option httpchk
    http-check send meth GET uri /readyz
    http-check expect status 200
    default-server check check-alpn h2 check-proto h2 check-sni ` + serverName + ` inter 1s fall 2 rise 2 on-marked-down shutdown-sessions ssl verify required ca-file {{.CA}} sni str(` + serverName + `) verifyhost ` + serverName + ` alpn h2
{{- range $i, $address := .Backends}}
    server apiserver{{$i}} {{$address}}
{{- end}}
`))

	// https://github.com/kubernetes/kubeadm/blob/main/docs/ha-considerations.md
	haproxyTCPTemplate = template.Must(template.New("haproxy-tcp").Parse(`defaults
    mode http
    option redispatch
    retries 1
    timeout queue 20s
    timeout connect 5s
    timeout client 35s
    timeout server 35s
    timeout check 10s
frontend apiserver
    bind {{.Listen}}
    mode tcp
    default_backend apiserverbackend
backend apiserverbackend
    mode tcp
    option httpchk
    http-check send meth GET uri /healthz
    http-check expect status 200
    balance roundrobin
{{- range $i, $address := .Backends}}
    server apiserver{{$i}} {{$address}} check check-ssl verify none
{{- end}}
`))

	// A single process: workers would outlive a master that is killed.
	nginxTemplate = template.Must(template.New("nginx").Parse(`daemon off;
master_process off;
pid {{.Dir}}/nginx.pid;
events {
    worker_connections 4000;
}
http {
    access_log off;
    client_body_temp_path {{.Dir}}/body;
    proxy_temp_path {{.Dir}}/proxy;
    fastcgi_temp_path {{.Dir}}/fastcgi;
    uwsgi_temp_path {{.Dir}}/uwsgi;
    scgi_temp_path {{.Dir}}/scgi;
    upstream apiservers {
        least_conn;
{{- range .Backends}}
        server {{.}};
{{- end}}
        keepalive 100;
    }
    server {
        listen {{.Listen}} ssl http2;
        ssl_certificate {{.Cert}};
        ssl_certificate_key {{.Key}};
        client_max_body_size 0;
        location / {
            proxy_pass https://apiservers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_connect_timeout 5s;
            proxy_read_timeout 1h;
            proxy_ssl_server_name on;
            proxy_ssl_name ` + serverName + `;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {{.CA}};
        }
    }
}
`))

	caddyTemplate = template.Must(template.New("caddy").Parse(`{
	admin off
	auto_https off
}
https://{{.Listen}} {
	bind 127.0.0.1
	tls {{.Cert}} {{.Key}}
	reverse_proxy{{range .Backends}} https://{{.}}{{end}} {
		lb_policy least_conn
		flush_interval -1
		health_uri /readyz
		health_interval 1s
		health_timeout 2s
		transport http {
			versions 2
			compression off
			tls_server_name ` + serverName + `
			tls_trusted_ca_certs {{.CA}}
		}
	}
}
`))
)
